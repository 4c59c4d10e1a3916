"""The foundation models: which there are, how they are loaded, the features and score of a tile.

    registry.py             one frozen row a model
    backbones.py            finds, builds, loads and calls a model
    checkpoints.py          reads its weights: package, file, folder, hub
    transformers_layout.py  renames weights of Hugging Face's transformers to timm's names
    heads.py                the heads of KEEP and CONCH v1.5, behind timm's model
    attention.py            a tile's score from the last block's CLS row
    tail.py                 the last block for the CLS token alone
    merging.py              like patch tokens merged block by block (ToMe)
    unfilled.py             models on the meta device, made without filling tensors
    pinned.py               copies to and from a GPU that do not wait
    compiled.py             torch.compile of blocks, for chunks of one shape
    fingerprint.py          a short hash of what an encoder computes

Knows nothing of slides, labels or training. Adding a model is a row of the registry.
"""
