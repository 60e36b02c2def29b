import sys

from tlx.base.launcher import ranked

if ranked() and sys.argv[1:2] == ["train"]:
    from tlx.runs.processes import early

    early()  # before the imports that take seconds: another rank may die meanwhile

from tlx.cli.main import main

main()
