"""What every other package uses: errors, files, text from strangers, parts by name, the environment, the terminal."""
