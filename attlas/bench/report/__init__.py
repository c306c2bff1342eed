"""The report: tables in the terminal (`terminal_tables`), and one HTML file (`write_html`).

Both show what `digest` works out from the records. The page is made of sections (`quality_section`,
`speed_section`) out of charts (`svg`), tables (`table`) and pictures of who sees whom
(`attlas.analysis.visible`); its style, script and definitions lie beside it as files.
"""

from attlas.bench.report.html import write_html
from attlas.bench.report.terminal import terminal_tables

__all__ = ["terminal_tables", "write_html"]
