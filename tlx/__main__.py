"""The process of a command: `tlx` and `python -m tlx`. What cannot wait comes before the imports that take long."""

import sys


def main() -> None:
    if sys.argv[1:2] == ["--complete"]:  # <Tab> in a shell: the line, and what of its last word the shell replaces
        from tlx.cli.complete import answer

        line, current = sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
        whole = line.split()[-1] if line.split() and not line[-1:].isspace() else ""
        behind = len(whole) - len(current) if current is not None else 0
        sys.stdout.write("".join(f"{word if word == '*' else word[behind:]}\n" for word in answer(line)))
        return
    from tlx.base.launcher import ranked

    if ranked() and sys.argv[1:2] == ["train"]:
        from tlx.runs.processes import early

        early()  # before the imports that take seconds: another rank may die meanwhile

    from tlx.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
