"""Sections of the report: a file here is a section, by its `SECTION` (see `hici.report.section`)."""
