"""`mmedit download`: published data sets and models, fetched, checked and put where they are looked for."""
