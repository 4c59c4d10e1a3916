"""Slides to predictions, heatmaps, exported models.

    prediction.py  what a model says of a slide or a case; all tiles, streamed
    predict.py     tapfm predict and heatmap: slides of no cohort, or a patient's as one
    heatmap.py     PNG overlay, GeoJSON for QuPath
    export.py      tapfm export: a plain timm model

All tiles, streamed, by the same forward path as in training.
"""
