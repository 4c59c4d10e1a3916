"""Adaptation of the encoder: which of its parameters learn, and how.

    surgery.py           what strategies share: freezing a timm ViT, finding its layers, prompts
    parameter_groups.py  parameters as AdamW groups: rates by layer, weight decay
    lowrank.py           the low-rank layer of LoRA and DoRA
    interpolation.py     weights between the pretrained model and the adapted one
    peft_layout.py       LoRA and DoRA adapters to and from files of the peft library
    pixels.py            colours and stain maps of the tile, for strategies that use them

`strategies` has one file a strategy. Knows no slide and no training run.
"""
