"""Which of the encoder's parameters learn: what strategies share; `strategies` has one file each.

    surgery.py           what strategies need of a timm ViT
    parameter_groups.py  parameters as AdamW groups: rates by layer, what decays
    lowrank.py           the layer that LoRA and DoRA share
    peft_layout.py       their adapters to and from the peft library's files
    pixels.py            the tile's colours and stains, for strategies that look at them

Knows no slide and no training run.
"""
