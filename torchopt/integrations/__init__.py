"""torchopt inside other people's trainers: one callback each, which calls `torchopt.step` after every optimizer step.

Both are optional: `pip install "torchopt-toolkit[lightning]"` or `"torchopt-toolkit[transformers]"`. Import the one you use,
`torchopt.integrations.lightning` or `torchopt.integrations.transformers`; importing this package imports neither.
"""
