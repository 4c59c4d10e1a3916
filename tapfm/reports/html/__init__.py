"""The HTML page of a report: `tapfm report` writes one file from the folder of runs.

    page.py            `tapfm report`: the page and its sections, from the template page.html
    comparison.py      `tapfm compare`, and a study's page
    adapting.py        how much of each run's change was saved: the curve over a
    panels.py          figures of a multi-label task, training and cost, as SVG
    outcome_panels.py  figures by task: confusions, scatter plots, Kaplan-Meier curves
    task_reports.py    what is written, drawn and shown, by kind of report
    tables.py          tables, from whatever is in metrics_<split>.json
    cards.py           a card for each example slide
    case_pictures.py   the pictures on the cards
    label_record.py    where the cohort's labels come from

The page needs no other file and no script.
"""
