"""What a person looks at: figures, the page, tables of runs."""
