"""The page of launch/explore.py: what a trace is read into, what is shown of it, and the page.

Of a trace: index is built once (examples, leads and what analysis.count_trace counts), pair of two
traces of the same tokens; run_log is a run's training log. maps, expert, curves and comparison
look numbers up in them; pieces and figures are HTML and plotly figures as plain dicts. app.py is
the page itself, the only file that imports marimo and plotly.
"""
