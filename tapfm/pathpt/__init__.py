"""PathPT: learned prompts and a spatial mixer that name every tile of a slide, from few slides.

    new_slides.py  what it leaves, on slides of no cohort: `tapfm predict`, `tapfm heatmap`
    model.py       both together: tile logits, saved and loaded
    spatial.py    tiles look at their neighbours and at the slide
    pseudo.py     zero-shot tile labels; `vote.py`: a slide's class from its tiles'
    tile_loss.py  what is minimised
    few.py        draws of training slides
    train.py      on frozen features, or end to end into the image tower
    question.py   classes, prompts and settings, read from YAML
    scores.py     balanced accuracy and weighted F1
    tiles.py      slides as features, places and pixels
    findings.py   table, calls, pictures of tile classes
    run.py        `tapfm pathpt`

Source: PathPT (arXiv 2508.15904; Nature Communications 2026, doi 10.1038/s41467-026-71715-2).

Shapes everywhere: N tiles of a slide, C subtypes, K = C + 1 classes of a tile (0 is normal), d
joint width, D the image tower's own, L tokens of a text, W their width.
"""
