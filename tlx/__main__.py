import sys

from tlx.launcher import ranked

if ranked() and sys.argv[1:2] == ["train"]:
    from tlx.processes import early

    early()  # before the imports that take seconds: another rank may die meanwhile

from tlx.cli import main

main()
