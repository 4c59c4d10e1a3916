"""Labels from what is published: GDC manifest, mutations, the rules of a label.

    manifest.py        checks a GDC download and picks its diagnostic slides
    mutations.py       labels of cases from a MAF, a cBioPortal matrix or GigaPath's table
    source_kinds.py    what each kind of source says of a case's genes
    variants.py        which mutations a label counts
    protein_change.py  a protein change, however it is spelled
    source_text.py     text and rows of these files, as they come
    cohort_table.py    `tapfm labels`: a cohort table from a manifest and mutations

Reads tables and text and writes a cohort table; decodes no slide.
"""
