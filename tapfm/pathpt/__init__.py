"""PathPT: learned prompts and a spatial mixer that name every tile of a slide, from few slides.

    run.py         `tapfm pathpt`: few-shot training and test, beside frozen baselines
    question.py    classes, prompts and settings, read from YAML
    few.py         draws of training slides
    tiles.py       slides as features, grid places and pixels
    pseudo.py      zero-shot tile labels
    model.py       mixer and class vectors: tile logits, saved and loaded
    spatial.py     the mixer: tiles attend to their neighbours and to the slide
    tile_loss.py   the loss of a slide's tiles
    train.py       training on frozen features, or end to end into the image tower
    vote.py        a slide's class from its tiles' classes
    scores.py      balanced accuracy and weighted F1
    findings.py    table, predictions, pictures of tile classes
    new_slides.py  a saved model on slides outside a cohort: `tapfm predict`, `tapfm heatmap`
    text/          text towers, and prompts through them

Source: PathPT (arXiv 2508.15904; Nature Communications 2026, doi 10.1038/s41467-026-71715-2).

Shapes everywhere: N tiles of a slide, C subtypes, K = C + 1 classes of a tile (0 is normal), d
joint width, D the image tower's own, L tokens of a text, W their width.
"""
