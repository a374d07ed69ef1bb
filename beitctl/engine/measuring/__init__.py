"""What a run and a machine reach: operations, ceilings, profiles, checks of the numerics."""
