"""Predictions, heatmaps and exported models from a trained model.

    prediction.py  the prediction of a slide or a case, and its files
    predict.py     tapfm predict and heatmap: slides outside a cohort, singly or as one patient
    heatmap.py     tile weights as PNG overlay and GeoJSON for QuPath
    export.py      tapfm export: a plain timm model, a peft adapter, or a graph
    runtimes.py    ONNX and TorchScript: encoder and aggregator, checked against the model
    runtime_texts.py  their README, and a pipeline for FastPathology

All tiles, streamed, by the same forward path as in training.
"""
