"""`mmedit download`: fetches published data sets and models, checks them, and puts them where they are found."""
