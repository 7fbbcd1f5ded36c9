"""What maintainers run: generators of docs, figures, plans and test vectors."""
