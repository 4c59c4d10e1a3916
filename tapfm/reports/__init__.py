"""What runs said, as tables, pictures and one page.

    rows.py            a row: what one model said of a split
    example_slides.py  which those are, by task
    runs.py            a folder of runs, read back
    report.py          `tapfm test`: the table, the JSON, the pictures
    outcome_report.py  the same where labels are classes, values or times
    details.py         what stands behind a row: thresholds, calibration, DeLong, groups
    plain_table.py     a figure and its interval as a cell, Markdown, columns in line
    figures.py         ROC, reliability and training curves
    slide_table.py     the cohort's slides and what indexing made of them
    pooling.py         a study's folds pooled by case, seeds averaged

Nothing here needs a slide or a GPU.
"""
