"""The tables: slides, patients, targets, splits, labelled tiles; TCGA names.

    table.py           reads the cohort table; lists all its faults at once
    table_file.py      the file of a table, as programs write it, to rows of text
    mending.py         mends a table: names of columns, words, paths; `tapfm check --fix`
    leaks.py           one patient or one picture in two parts
    counts.py          cases, slides and label values of each split
    cases.py           a patient's slides as one bag
    targets.py         label columns by task: 0 and 1, classes, numbers, times
    splits.py          splits cases into train, val and test
    split_files.py     CLAM's and Patho-Bench's split files
    strata.py          labels to stratify over, for every task
    tcga_names.py      parses TCGA barcodes
    spelling.py        words for unknown; one patient, one class under several spellings
    labelled_tiles.py  labelled tiles from a table or folders, split by case
    resplit.py         `tapfm split`: splits a cohort table again

Works on tables; reads no pixels but those of labelled tiles.
"""
