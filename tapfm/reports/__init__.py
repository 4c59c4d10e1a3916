"""What runs said, as tables, pictures and one page.

    arms.py            a row: what one model said of a split
    runs.py            a folder of runs, read back
    report.py          `tapfm test`: the table, the JSON, the pictures
    outcome_report.py  the same where labels are classes, values or times
    details.py         what stands behind a row: thresholds, calibration, DeLong, groups
    plain_table.py     a figure and its interval as a cell, Markdown, columns in line
    figures.py         ROC, reliability and training curves
    page.py            `tapfm report`: everything on one HTML page, of page.html
    panels.py          its drawings, as SVG
    outcome_panels.py  which of them a task has; confusions, scatter, Kaplan-Meier's curves
    tables.py          its tables, from whatever is in metrics_<split>.json
    slide_table.py     the cohort's slides and what indexing made of them
    label_record.py    where the table's labels come from
    cards.py           its slides to look at
    surest.py          which those are, by task
    case_pictures.py   their pictures
    pooling.py         a study's folds pooled by case, seeds averaged

Nothing here needs a slide or a GPU.
"""
