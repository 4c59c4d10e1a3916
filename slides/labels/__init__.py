"""Labels from what is published: GDC manifest, mutations, the rules of a label.

    manifest.py      a GDC download: whole or not, and which slides are diagnostic
    mutations.py     labels of cases from a MAF, a matrix, GigaPath's table
    variants.py      which mutations a label counts
    cohort_table.py  tapfm labels: a cohort table from a manifest and mutations

Tables and text in, a cohort table out; no slide is decoded.
"""
