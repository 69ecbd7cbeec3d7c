"""Classes that other programs load; each module here needs the program that it is for, so nothing else imports it."""
