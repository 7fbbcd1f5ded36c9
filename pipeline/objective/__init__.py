"""What is optimised, and how well drafts agree with the verifier."""
