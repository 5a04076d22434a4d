"""What each part of the method does to learning: runs of the shipped model, paired by seed, each at its own best rate.

``design`` says which runs; ``work`` makes one; ``__main__`` makes all that are missing, one process a core, and draws;
``outcomes`` computes what is claimed from ``results.json``; ``draw`` writes the tables and plots of docs/study.md.
"""
