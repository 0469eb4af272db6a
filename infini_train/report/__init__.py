"""Read the results of a run and render them as HTML pages and charts."""
