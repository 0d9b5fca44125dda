//! Draws a design: its name on a coloured ground.

use std::convert::Infallible;
use std::io::Cursor;

use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::FONT_10X20;
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::{DrawTarget, Drawable, OriginDimensions, Pixel, Point, RgbColor, Size};
use embedded_graphics::text::{Alignment, Text};
use image::{ImageError, ImageFormat, Rgb, RgbImage};

const WIDTH: u32 = 480;
const HEIGHT: u32 = 270;

/// A picture of a design, as PNG.
pub(super) fn png(design: &str) -> Result<Vec<u8>, ImageError> {
    let hue = design.bytes().fold(7_u8, |hue, byte| hue.wrapping_mul(31).wrapping_add(byte));
    let mut canvas = Canvas(RgbImage::from_fn(WIDTH, HEIGHT, |x, y| {
        let shade = |end: u32, most: u32| u8::try_from(end * 255 / most).unwrap_or(u8::MAX);
        Rgb([shade(x, WIDTH) / 2, hue / 2, shade(y, HEIGHT) / 2 + 64])
    }));
    let style = MonoTextStyle::new(&FONT_10X20, Rgb888::WHITE);
    let middle = Point::new(WIDTH as i32 / 2, HEIGHT as i32 / 2);
    // Drawing on a canvas in memory cannot fail.
    let Ok(_) = Text::with_alignment(design, middle, style, Alignment::Center).draw(&mut canvas);
    let mut png = Cursor::new(Vec::new());
    canvas.0.write_to(&mut png, ImageFormat::Png)?;
    Ok(png.into_inner())
}

struct Canvas(RgbImage);

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.0.width(), self.0.height())
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, colour) in pixels {
            let at = (u32::try_from(at.x), u32::try_from(at.y));
            if let (Ok(x), Ok(y)) = at
                && let Some(pixel) = self.0.get_pixel_mut_checked(x, y)
            {
                *pixel = Rgb([colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}
