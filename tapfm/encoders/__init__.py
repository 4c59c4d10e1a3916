"""Foundation models: which there are, how they are loaded, what they say of a tile.

    registry.py             one frozen row a model
    backbones.py            building and calling one
    checkpoints.py          its weights: package, file, folder, hub
    transformers_layout.py  weights named as Hugging Face's transformers names them
    heads.py                KEEP's and CONCH v1.5's, behind timm's model
    attention.py            a tile's score from the last block's CLS row
    tail.py                 the last block for the CLS token alone
    compiled.py             torch.compile of blocks, chunks of one shape
    fingerprint.py          a short name for what an encoder computes

Knows nothing of slides, labels or training. Adding a model is a row of the registry.
"""
