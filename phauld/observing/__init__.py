"""Who is told of migrations: metrics, traces, the page and its JSON."""
