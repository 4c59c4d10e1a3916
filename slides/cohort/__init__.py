"""The tables: slides, patients, targets, splits, labelled tiles; TCGA names.

    table.py           slides, cases, labels, splits; all faults at once
    cases.py           a patient's slides as one bag
    targets.py         what label columns hold: 0 and 1, classes, numbers, times
    splits.py          cases dealt to train, val and test
    split_files.py     CLAM's and Patho-Bench's split files
    strata.py          what they are stratified over, for every task
    tcga_names.py      what a barcode says
    labelled_tiles.py  labelled tiles: a table or folders, parts by case
    resplit.py         tapfm split: a cohort dealt anew

Knows tables, and opens no slide but to read its properties.
"""
