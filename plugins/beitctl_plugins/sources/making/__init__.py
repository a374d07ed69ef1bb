"""Questions, statements and scenes that are made from the data set that ships with beitctl."""
