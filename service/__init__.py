"""The HTTP front end and the job contract of Compress-to-Impress. Imports neither torch nor workers."""
