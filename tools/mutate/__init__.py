"""Mutation testing: changes one operator, constant or branch at a time and lists the changes that no test notices."""
