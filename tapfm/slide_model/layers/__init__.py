"""Layers that several aggregators share.

attention.py  min-max of a score, a learned gate, how many tiles are looked at
blocks.py     a transformer block over short sequences
tile_head.py  class logits of each tile, for tile labels
"""
