"""Reports: a row a weight, the table of a run, and a page to look at."""

from torchopt.report.html import write_html
from torchopt.report.rows import Report, Row, report
from torchopt.report.summary import histogram, summary_rows, summary_table

__all__ = ["Report", "Row", "histogram", "report", "summary_rows", "summary_table", "write_html"]
