"""Studies: each asks one question of a model beside its store, and answers with one sealed record and one figure."""
