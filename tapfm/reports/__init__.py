"""Results of runs as tables, figures and one HTML page.

    rows.py            a result row: one model's predictions of a split
    runs.py            a folder of runs, read back
    report.py          `tapfm test`: the table, the JSON, the figures of multi-label runs
    outcome_report.py  the same for classes, values and survival times
    compare.py         runs against each other, on the same slides and draws
    summary.py         report.json: what a report decides, for programs
    verdict.py         what an adapted run gained over its frozen control, in a sentence
    details.py         details of a row: thresholds, calibration, DeLong, groups
    example_slides.py  slides worth looking at, by task
    plain_table.py     text tables: a metric with its interval as a cell, Markdown, aligned columns
    figures.py         ROC, reliability and training curves
    slide_table.py     the cohort's slides and their indexing
    pooling.py         a study's folds pooled by case, seeds averaged
    html/              the page, its panels and tables

Nothing here needs a slide or a GPU.
"""
