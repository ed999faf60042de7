"""The timeline record and what is made of it: summaries, traces, charts."""
