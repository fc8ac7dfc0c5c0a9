"""What a paper says of a model, of results and of an evaluation, from the files that volseg wrote.

A sentence is a template whose fields name keys of those files, so each number has a key.
"""
