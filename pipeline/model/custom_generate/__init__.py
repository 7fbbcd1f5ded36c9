"""What an exported folder drafts with in transformers: its files are copied into the export as they
are, so they import nothing of this project (docs/decoding.md).
"""
