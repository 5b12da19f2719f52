"""What people read and sign: figures, tables, the HTML report, the certificate. Data in, bytes out."""
