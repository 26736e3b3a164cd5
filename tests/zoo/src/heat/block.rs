//! One thread's rows of the field and the step that advances them.

use super::settings::Settings;

/// The rows of one thread with one more row above and below.
pub(super) struct Block {
    pub(super) width: usize,
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) now: Vec<f64>,
    pub(super) next: Vec<f64>,
}

#[derive(Clone, Copy)]
pub(super) enum Edge {
    Top,
    Bottom,
}

impl Block {
    pub(super) fn new(settings: &Settings, block: usize) -> Block {
        let (width, first_row) = (settings.size, settings.first_row(block));
        let rows = settings.first_row(block + 1) - first_row;
        let mut now = vec![0.0; (rows + 2) * width];
        for row in 0..rows {
            for column in 0..width {
                now[(row + 1) * width + column] = initial(width, first_row + row, column);
            }
        }
        let next = now.clone();
        Block {
            width,
            first_row,
            rows,
            now,
            next,
        }
    }

    /// One Jacobi step; returns the largest change of a cell.
    pub(super) fn advance(&mut self) -> f64 {
        let width = self.width;
        let mut largest = 0.0_f64;
        for row in 1..=self.rows {
            let field_row = self.first_row + row - 1;
            if field_row == 0 || field_row == width - 1 {
                continue;
            }
            let (above, rest) = self.now[(row - 1) * width..(row + 2) * width].split_at(width);
            let (here, below) = rest.split_at(width);
            let target = &mut self.next[row * width..(row + 1) * width];
            for column in 1..width - 1 {
                let around =
                    (above[column] + below[column]) + (here[column - 1] + here[column + 1]);
                let value = here[column] + 0.2 * (around - 4.0 * here[column]);
                largest = largest.max((value - here[column]).abs());
                target[column] = value;
            }
        }
        std::mem::swap(&mut self.now, &mut self.next);
        largest
    }

    pub(super) fn edge(&self, edge: Edge) -> &[f64] {
        let row = match edge {
            Edge::Top => 1,
            Edge::Bottom => self.rows,
        };
        &self.now[row * self.width..(row + 1) * self.width]
    }

    pub(super) fn set_halo(&mut self, edge: Edge, row: &[f64]) {
        let index = match edge {
            Edge::Top => 0,
            Edge::Bottom => self.rows + 1,
        };
        self.now[index * self.width..(index + 1) * self.width].copy_from_slice(row);
    }

    /// The block's own rows as little-endian bytes.
    pub(super) fn bytes(&self) -> Vec<u8> {
        to_bytes(&self.now[self.width..(self.rows + 1) * self.width])
    }
}

/// Hot at the top, cold elsewhere on the border, uneven inside; exact in f64.
pub(super) fn initial(size: usize, row: usize, column: usize) -> f64 {
    if row == 0 {
        100.0
    } else if row == size - 1 || column == 0 || column == size - 1 {
        0.0
    } else {
        ((row * 31 + column * 17) % 101) as f64
    }
}

pub(super) fn to_bytes(numbers: &[f64]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

pub(super) fn to_numbers(bytes: &[u8]) -> Vec<f64> {
    let words = bytes.as_chunks::<8>().0;
    words.iter().map(|word| f64::from_le_bytes(*word)).collect()
}
