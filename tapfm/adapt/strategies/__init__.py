"""?.

    adaptformer.py  a bottleneck beside every MLP
    bitfit.py       biases
    dora.py         the same, and the length of their rows
    frozen.py       nothing, all else as in the others: their control
    full.py         everything
    hiadapter.py    tokens look at the tile's optical density and stains
    last_n.py       the last blocks and the final norm
    lora.py         a low-rank change of matrices
    norm_only.py    norms
    pathotune.py    prompts for the task, from a sentence, of the tile
    ssf.py          scale and shift of every operation
    vpt_deep.py     prompt tokens before every block

?
"""
