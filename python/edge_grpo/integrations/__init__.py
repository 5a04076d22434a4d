"""The method in other people's trainers, one module for each: the same pure pieces in their loops.

Nothing is imported here. Each module needs the trainer that it is named after, and says so where that is missing.
"""
