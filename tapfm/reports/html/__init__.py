"""?.

    page.py            `tapfm report`: everything on one HTML page, of page.html
    panels.py          its drawings, as SVG
    cards.py           its slides to look at
    tables.py          its tables, from whatever is in metrics_<split>.json
    outcome_panels.py  which of them a task has; confusions, scatter, Kaplan-Meier's curves
    task_reports.py    the table of what is written, drawn and shown, by kind of report
    case_pictures.py   their pictures
    label_record.py    where the table's labels come from

?
"""
