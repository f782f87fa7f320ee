"""`kvloom load`: seeded requests against any server with OpenAI's completions API, and what became of them.

Read `work` (what is asked, and when), `traces`, `prompts` (tokens or text), `client` (one stream), `run` (all of them),
`report` (percentiles), `page`.
"""
