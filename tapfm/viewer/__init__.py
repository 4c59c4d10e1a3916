"""`tapfm view`: the slides of a run in a browser, with what the model makes of each tile.

    contents.py   what a run has to show: slides by error, tiles with weights and predictions
    pyramid.py    a slide as deep zoom tiles, and single tiles
    server.py     the local page, on 127.0.0.1 alone
    static.py     the same page as files to send
    page/         page, script and style; OpenSeadragon from its npm package, with its licence

Nothing leaves the machine, and nothing is loaded from elsewhere.
"""
