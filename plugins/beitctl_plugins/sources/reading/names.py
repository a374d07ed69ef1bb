"""Names that sources look for: endings of pictures, and columns of tables, best first."""

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "path", "img", "picture", "url")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences", "title", "description")
LABEL_COLUMNS = ("label", "class", "category", "label_name")
TEXT_COLUMNS = ("text", "content", "body", "document")
