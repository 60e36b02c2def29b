from tlx.launcher import ranked

if ranked():
    from tlx.processes import early

    early()  # before the imports that take seconds: another rank may die meanwhile

from tlx.cli import main

main()
