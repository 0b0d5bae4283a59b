"""The HTML report of an evaluation sweep: tables, charts and image galleries in one page."""
