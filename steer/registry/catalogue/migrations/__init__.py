"""How catalogues of earlier schemas become the present one, by Alembic, forwards only."""
